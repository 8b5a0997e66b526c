"""How the user reached the command, so that what is printed can be typed."""

import os
import shutil
import sys

COMMAND = "diptych"


def own_name() -> str:
    """Of a program that is not the command itself: the command's."""
    typed = sys.argv[0]
    return COMMAND if os.path.basename(typed) != COMMAND or shutil.which(COMMAND) == typed else os.path.relpath(typed)
