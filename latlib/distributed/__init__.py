"""Several processes that train one model: who they are, what is summed over them, and how they
start.
"""
