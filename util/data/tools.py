"""Tools, tool calls and tool results -> plain messages, so that agents' episodes train as any conversation does.

The keys are OpenAI's: `tools` beside `messages`, `tool_calls` in an assistant message, and messages of role `tool`,
whose content may hold images (the next screenshot). Qwen2-VL's chat template knows none of them. So they are written as
the templates of Qwen2.5 and Qwen-Agent (fncall_prompts/nous_fncall_prompt.py) write them and servers parse them (their
name is "hermes"): the tools at the end of the system message, `<tool_call>` with JSON in the assistant's turn,
`<tool_response>` in a user's turn. All of it is plain text to the tokenizer. The assistant's turns are supervised,
calls included; tools and their results are not.

`calls_of` reads the text of an answer back: for an agent that acts (util/agent) and for the metric `tool_call`.
"""

import json
import re
from collections.abc import Iterator
from itertools import groupby
from typing import NoReturn

from util.data.lines import DataError

CALL = "<tool_call>\n", "\n</tool_call>"
RESPONSE = "<tool_response>\n", "\n</tool_response>"
# Models of the family were trained with these words, and servers send them: every character counts.
SYSTEM = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>
{tools}
</tools>

For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:
<tool_call>
{{"name": <function-name>, "arguments": <args-json-object>}}
</tool_call>"""
CALL_IN_TEXT = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
CALL_MARK = re.compile(r"</?tool_call>")
A_TOOL = "'tools' is a list of {'type': 'function', 'function': {'name': ..., 'parameters': ...}}"
A_CALL = "a tool call is {'type': 'function', 'function': {'name': ..., 'arguments': {...}}}"


def turns(entry: dict, default_system: str = "") -> Iterator[tuple[str, dict]]:
    """The messages of an entry as plain ones, each as (the words that name it in an error, `, message 3: `; message).

    Messages of role `tool` in a row become one user message. Only what concerns tools is checked here: DataError for
    tools, calls and results that break a rule. `default_system`: stands before the tools where the entry has no system
    message, as the model's own template has it.
    """
    tools = read_tools(entry.get("tools"))
    messages = entry["messages"]
    names = {tool["function"]["name"] for tool in tools}
    system = SYSTEM.format(tools="\n".join(dumps(tool, ": ") for tool in tools)) if tools else ""
    if tools and role_of(messages[0]) != "system":
        said = f"{default_system}\n\n" if default_system else ""
        yield ", tools: ", {"role": "system", "content": said + system}
    before: dict = {}
    for from_tools, group in groupby(enumerate(messages), lambda pair: role_of(pair[1]) == "tool"):
        group = list(group)
        if from_tools:
            yield responses(group, before)
            before = group[-1][1]
            continue
        for number, message in group:
            where = f", message {number}: "
            if role_of(before) == "tool" and role_of(message) == "user":
                raise DataError(f"{where}a user message after a tool's, which is written as a user's turn itself; put "
                                "its text and images into the content of the tool's message")  # fmt: skip
            if number == 0 and tools and role_of(message) == "system":
                message = with_text(message, f"\n\n{system}")
            if role_of(message) == "assistant" and message.get("tool_calls"):
                calls = "\n".join(calls_in_text(message, names, where))
                message = with_text(message, f"\n{calls}" if message.get("content") else calls)
            elif isinstance(message, dict) and message.get("tool_calls"):
                raise DataError(f"{where}only an assistant message can have tool_calls; move them into one")
            yield where, message
            before = messages[number]


def role_of(message: object) -> object:
    return message.get("role") if isinstance(message, dict) else None


def with_text(message: dict, text: str) -> dict:
    """A message with text after its content, which may be missing. Content that is neither text nor a list stays."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = [*content, {"type": "text", "text": text}]
    elif isinstance(content, str):
        content += text
    return {**message, "content": content}


def read_tools(tools: object) -> list[dict]:
    """The tools of an entry, each with a key `function`. A bare function gets that key; JSON text is parsed first."""
    if isinstance(tools, str):
        tools = loads(tools, f": 'tools' is no JSON; {A_TOOL}") if tools.strip() else None
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise DataError(f": 'tools' is {type(tools).__name__}; {A_TOOL}")
    read = []
    for number, tool in enumerate(tools):
        if isinstance(tool, dict) and "function" not in tool and "name" in tool:
            tool = {"type": "function", "function": tool}
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not is_name(function.get("name")):
            raise DataError(f": tool {number} has no function with a name; {A_TOOL}")
        dumps(tool, f": tool {number}: ")  # refuses numbers that JSON does not know
        read.append(tool)
    return read


def is_name(name: object) -> bool:
    return isinstance(name, str) and bool(name.strip())


def calls_in_text(message: dict, names: set[str], where: str) -> list[str]:
    """The text of each call of an assistant message, between its marks; `names`: of the sample's tools."""
    calls = message["tool_calls"]
    if not isinstance(calls, list):
        raise DataError(f"{where}tool_calls is {type(calls).__name__}, not a list; {A_CALL}")
    return [read_call(call, names, where).join(CALL) for call in calls]


def read_call(call: object, names: set[str], where: str) -> str:
    """The JSON text of one call, its arguments given as a dictionary or as JSON text."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not is_name(function.get("name")):
        raise DataError(f"{where}a call without a function's name; {A_CALL}")
    name = function["name"]
    arguments = function.get("arguments")
    if names and name not in names:
        raise DataError(f"{where}calls {name!r}, which is not among the sample's tools ({', '.join(sorted(names))}); "
                        "correct the name or add the tool")  # fmt: skip
    if isinstance(arguments, str):
        arguments = loads(arguments, f"{where}the arguments of {name!r} are no JSON; {A_CALL}") if arguments else {}
    if not isinstance(arguments, dict):
        raise DataError(f"{where}the arguments of {name!r} are {type(arguments).__name__}, not a dictionary; {A_CALL}")
    text = dumps({"name": name, "arguments": arguments}, where)
    if CALL[1].strip() in text:
        raise DataError(f"{where}a call of {name!r} holds '</tool_call>', which would end it early; take it out")
    return text


def responses(group: list[tuple[int, dict]], before: dict) -> tuple[str, dict]:
    """Messages of role `tool` in a row as one user message; `before` is the message that they follow."""
    first = group[0][0]
    last = group[-1][0]
    where = f", message {first}: "
    if role_of(before) != "assistant":
        raise DataError(f"{where}a tool's message must follow the assistant message that calls the tool; add it")
    if calls := before.get("tool_calls"):
        if len(group) != len(calls):
            raise DataError(f"{where}{len(group)} message(s) of tools for {len(calls)} call(s); each call has one")
        ids = [call.get("id") for call in calls if isinstance(call, dict)]
        given = [message.get("tool_call_id") for _, message in group]
        if None not in ids and None not in given and ids != given:
            raise DataError(f"{where}answers to {given}, but called were {ids}; put the answers in the calls' order, "
                            "as the text for the model holds no ids")  # fmt: skip
    parts: list[dict] = []
    for number, message in group:
        content = message.get("content")
        items = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(items, list):
            raise DataError(f", message {number}: content must be text or a list of items, is {type(items).__name__}")
        begin = ("\n" if parts else "") + RESPONSE[0]
        parts += [{"type": "text", "text": begin}, *items, {"type": "text", "text": RESPONSE[1]}]
    if len(group) > 1:
        where = f", messages {first} to {last}: "
    return where, {"role": "user", "content": parts}


def loads(text: str, problem: str) -> object:
    """The value of JSON text. DataError with the given problem where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(problem) from None


def dumps(value: dict, where: str) -> str:
    """JSON as Qwen's templates write it: on one line, without \\u escapes. DataError for NaN and infinity."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise DataError(f"{where}holds a number that JSON does not know (NaN or infinity); write null") from None


# ---- text to calls --------------------------------------------------------------------------------------------------


class MalformedCall(ValueError):
    """A tool call in an answer that cannot be read; the message says what is wrong with it."""


def calls_of(answer: str) -> tuple[str, list[dict]]:
    """An answer taken apart: its text without calls, and its calls as {"name": ..., "arguments": {...}}, in order.

    White space at the ends of the text goes, as calls are written on lines of their own. Raises MalformedCall.
    """
    calls = [read_call_text(text) for text in CALL_IN_TEXT.findall(answer)]
    said = CALL_IN_TEXT.sub("", answer)
    if mark := CALL_MARK.search(said):
        raise MalformedCall(f"a {mark[0]} without its {'<tool_call>' if '/' in mark[0] else '</tool_call>'}")
    return said.strip(), calls


def read_call_text(text: str) -> dict:
    """The call that stands between its marks. Raises MalformedCall."""
    try:
        call = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError) as error:
        raise MalformedCall(f"what stands between <tool_call> and </tool_call> is no JSON ({error})") from None
    if not isinstance(call, dict) or not is_name(call.get("name")):
        raise MalformedCall('a call is {"name": ..., "arguments": {...}}')
    if others := sorted(call.keys() - {"name", "arguments"}):
        raise MalformedCall(f"a call has the keys name and arguments; {', '.join(others)} stand beside them")
    if not isinstance(call.get("arguments"), dict):
        raise MalformedCall(f"the arguments of {call['name']} are no JSON object")
    return call


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def same_json(one: object, other: object) -> bool:
    """Whether two values are the same JSON: keys in any order, 1 and 1.0 alike, while true and 1 differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same_json(value, other[key]) for key, value in one.items())
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same_json, one, other))
    return isinstance(one, bool) == isinstance(other, bool) and one == other
