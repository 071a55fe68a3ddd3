"""What a run's files tell of it afterwards, as numbers, pictures and one page; needs neither torch nor a GPU."""
