"""The server: what each rpc does, for whom, and the process that answers."""
