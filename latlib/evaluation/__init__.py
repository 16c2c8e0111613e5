"""Ask models and grade their replies: every figure starts as a row of the outcome table made
here.
"""
