"""A repository behind a service, as its clients see it: the seam and the jobs of a repository, over gRPC.

Read upwards:

    opening                 from a URL to a repository
    store  jobs             what is read, and what is done there
    push                    what is written
    channel                 calls, errors, patience
    place                   URLs and credentials
"""
