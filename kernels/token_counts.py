"""What stands in the table that penalties go by: [slots, vocab] int16, a row for each sequence, on the device.

    0: the token has not come up    n > 0: n times in the output    IN_PROMPT + n: in the prompt, and n times in the output
"""

IN_PROMPT = -(1 << 15)
MOST_COUNTED = (1 << 15) - 1    # a token that is more often in an output is not counted on
