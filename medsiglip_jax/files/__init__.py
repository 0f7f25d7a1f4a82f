"""Files and folders, on disks and in buckets alike: places, locks, and one way to write."""
