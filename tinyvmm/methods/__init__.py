"""What can be asked of a machine that runs: the methods of its control socket."""
