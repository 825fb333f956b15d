"""What tests of threads and interruptions share."""


def entered(block):
    with block:
        pass
