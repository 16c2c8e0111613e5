"""The geometry of refusal: activations, directions, their selection, and what is left without
them.
"""
