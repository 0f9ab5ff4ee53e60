"""Bytes <-> model: everything that FORMAT.md describes, and nothing that reads or writes.

entry  fold               the log, and the state that it adds up to
version  manifest  pack   what a version is, where it was written, blobs in packs
names  digests            of objects; of everything
canonical                 JSON in one form
"""
