"""Content-addressed, delta-compressed history for named tensors.

``engine/README.md`` has the floors, the flows and the decisions, ``engine/FORMAT.md`` every byte on disk. A module
imports only from the floors below its own.

Only ``lamella`` is public; everything here may change with it.
"""
