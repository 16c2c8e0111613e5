"""The made-up world: fairy-tale requests whose right answers are known, and the small model that
lives in it.
"""
