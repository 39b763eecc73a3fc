"""What errors of other libraries say, for messages of one line."""


def first_line(error: BaseException) -> str:
    """First line of an error's message; the name of its type if there is no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
