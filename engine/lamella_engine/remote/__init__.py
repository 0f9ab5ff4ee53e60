"""A repository behind a service, as its clients see it: the seam and the jobs of a repository, over gRPC.

Read upwards:

    opening                 from a URL to a repository
    store  jobs             what is read, and what is done there
    push  caching           what is written, and what is read by way of the cache
    channel  cache          calls, errors, patience; chunks kept on this machine
    place                   URLs and credentials
"""
