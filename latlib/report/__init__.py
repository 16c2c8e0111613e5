"""What a run measured: evidence, statistics, claims, checks, figures and the page that shows
them.
"""
