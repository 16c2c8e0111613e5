"""Attacks on trained models: in the residual stream, in suffixes, in what is typed, and in
encodings.
"""
