"""Processes, devices, files and buckets, logs and the command line: what every command stands on."""
