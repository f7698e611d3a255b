"""The arguments of a tool call against the tool's JSON schema, as far as schemas of tools commonly go.

Checked are `type` (one or a list), `enum`, `const`, `minimum`, `maximum`, `exclusiveMinimum`, `exclusiveMaximum`,
`required`, `properties`, `additionalProperties` and `items`, at any depth. Nothing else is: no patterns, formats,
lengths, `anyOf` or `$ref`. Where a schema lists properties, others are refused unless `additionalProperties` allows
them: JSON Schema would let them pass, a Python function would not.
"""

from collections.abc import Iterator

from util.data.tools import same_json

TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "number": (int, float),
    "integer": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}


def problems_of(value: object, schema: object, name: str) -> Iterator[str]:
    """What is wrong with a value, each in a few words; `name`: of the value, as `arguments.x`."""
    if not isinstance(schema, dict):  # `true`: anything goes
        return
    if not is_of_type(value, schema.get("type")):
        yield f"{name} must be of type {in_words(schema['type'])}, is {value!r:.40}"
        return
    if "enum" in schema and not any(same_json(value, choice) for choice in schema["enum"]):
        yield f"{name} must be one of {', '.join(map(repr, schema['enum']))}, is {value!r:.40}"
    if "const" in schema and not same_json(value, schema["const"]):
        yield f"{name} must be {schema['const']!r}, is {value!r:.40}"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        yield from problems_of_range(value, schema, name)
    if isinstance(value, dict):
        yield from problems_of_object(value, schema, name)
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from problems_of(item, schema.get("items", True), f"{name}[{number}]")


def is_of_type(value: object, wanted: object) -> bool:
    """Whether a value has the type, or one of the types, of a schema. 2.0 is an integer; true is no number."""
    kinds = wanted if isinstance(wanted, list) else [wanted]
    return any(is_of_one_type(value, kind) for kind in kinds)


def is_of_one_type(value: object, kind: object) -> bool:
    if not isinstance(kind, str) or kind not in TYPES:  # none is given, or one that JSON Schema does not know
        return True
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, TYPES[kind])


def in_words(wanted: object) -> str:
    return " or ".join(wanted) if isinstance(wanted, list) else str(wanted)


def problems_of_range(value: float, schema: dict, name: str) -> Iterator[str]:
    if value < schema.get("minimum", value):
        yield f"{name} must be at least {schema['minimum']}, is {value!r:.40}"
    if value > schema.get("maximum", value):
        yield f"{name} must be at most {schema['maximum']}, is {value!r:.40}"
    if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
        yield f"{name} must be above {schema['exclusiveMinimum']}, is {value!r:.40}"
    if "exclusiveMaximum" in schema and value >= schema["exclusiveMaximum"]:
        yield f"{name} must be below {schema['exclusiveMaximum']}, is {value!r:.40}"


def problems_of_object(value: dict, schema: dict, name: str) -> Iterator[str]:
    properties = schema.get("properties")
    for key in schema.get("required", []):
        if key not in value:
            yield f"{name}.{key} is missing"
    for key, item in value.items():
        if properties is not None and key in properties:
            yield from problems_of(item, properties[key], f"{name}.{key}")
        elif isinstance(schema.get("additionalProperties"), dict):
            yield from problems_of(item, schema["additionalProperties"], f"{name}.{key}")
        elif not schema.get("additionalProperties", properties is None):
            known = ", ".join(properties) if properties else "none"
            yield f"{name}.{key} is unknown; known: {known}"
