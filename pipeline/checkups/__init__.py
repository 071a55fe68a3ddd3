"""What can be found out about a machine, its disks and a run before the run is started."""
