"""Machines that run, or have ended, as others see them: their state, output and control socket."""
