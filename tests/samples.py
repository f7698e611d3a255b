"""Entries of data files, in few words."""


def user(content) -> dict:
    return {"role": "user", "content": content}


def assistant(content) -> dict:
    return {"role": "assistant", "content": content}


def system(content) -> dict:
    return {"role": "system", "content": content}


def entry(*messages) -> dict:
    return {"messages": list(messages)}


def text(text) -> dict:
    return {"type": "text", "text": text}
