"""What every command uses: processes, devices, files and buckets, logs, the command line."""
