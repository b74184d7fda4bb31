"""Writes src/query/operations.txt: the parameters of the operations that src/ec2 serves, as botocore's model of EC2 has
them. Run with a Python that has botocore: python api/tools/operations.py"""

import pathlib
import re

import botocore.loaders

HERE = pathlib.Path(__file__).parent.parent / "src"
MODEL = botocore.loaders.Loader().load_service_model("ec2", "service-2")
TYPES = {"string": "str", "integer": "int", "long": "int", "boolean": "bool", "blob": "blob", "timestamp": "time",
         "double": "float", "float": "float"}


def upper(name):
    return name[0].upper() + name[1:]


def kind(name, above):
    shape = MODEL["shapes"][name]
    if shape["type"] == "list":
        return f"[{kind(shape['member']['shape'], above)}]"
    if shape["type"] == "structure":
        return "{" + members(shape, above + (name,)) + "}" if name not in above else "{}"
    return TYPES[shape["type"]]


def members(shape, above=()):
    told = []
    for name, member in shape["members"].items():
        query = member.get("queryName") or upper(member.get("locationName", name))
        must = "!" if name in shape.get("required", []) else ""
        told.append(f"{query}:{kind(member['shape'], above)}{must}")
    return " ".join(told)


served = set()
for path in (HERE / "ec2").glob("*.rs"):
    text = re.sub(r"const LATER.*?];", "", path.read_text(), flags=re.S)
    served |= set(re.findall(r'"([A-Z][A-Za-z]+)"', text))
lines = ["# The parameters of each operation: NAME:TYPE, ! where it has to be there, [ ] lists, { } structures."]
for name in sorted(served & set(MODEL["operations"])):
    lines.append(f"{name} {members(MODEL['shapes'][MODEL['operations'][name]['input']['shape']])}")
(HERE / "query" / "operations.txt").write_text("\n".join(lines) + "\n")
