"""bfloat16 and float8 in Zarr: importing this module makes their data types known to zarr in this process.

Views of versions and transactions need no such import. A plain Zarr directory that holds these types does, such as one
that ``lamella checkout --format zarr`` wrote:

    import lamella.zarr, zarr

    zarr.open_group("out")["layer.weight"]    # an array of ml_dtypes.bfloat16

The names are those of zarr-extensions, so other libraries read the same files.
"""

from lamella_engine.zarr_arrays import register_dtypes

register_dtypes()
