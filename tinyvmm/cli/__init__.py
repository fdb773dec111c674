"""One module for each command: arguments in, an API call, an answer out."""
