"""A run's folder: what is there is loaded, what is missing is made, and nothing half-made looks
finished.
"""
