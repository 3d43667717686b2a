"""The command lines, each thin: flags in, one line per mistake out; others do the work.

This is where the two meet: evaluation takes functions, models make them.
"""
