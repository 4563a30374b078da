"""The read-only HTTP interface: views over what the daemon last published, and nothing else."""
