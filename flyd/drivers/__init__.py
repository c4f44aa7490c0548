"""What runs machines on a host: ports.Driver for process groups and for containers."""
