"""The seam, and the store beneath it: deduplication, packs, locators, bases, the log.

packed                    a ContentStore on objects
push                      what is missing, packs for it, one entry that makes it a version
bases  intake  locating   what a chunk may be made against; blobs checked; the packs that a version stands on
reader                    from an id to metadata, cells and copies
revisions  packs  log     how a version is named; blobs in packs; all that is asked of the log
committing                from a change to an entry that is there; commits that wait share one (together)
entries                   the log as it lies in the store, followed from one state to the next; folds
trust  acting             who may sign; what a commit says of itself
decoding                  from a chain of blobs to a chunk
seam                      the interface: what is above speaks in versions, cells and blobs
manifest                  pages, read as they are needed
"""
