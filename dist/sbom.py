#!/usr/bin/env python3
"""What a program of ours is made of: the crates that are linked into it.
usage: dist/sbom.py cyclonedx|licences PACKAGE
cyclonedx: a software bill of materials (CycloneDX 1.5, JSON). licences: the licence texts of all of them.
"""
import json, os, pathlib, platform, subprocess, sys

if len(sys.argv) != 3 or sys.argv[1] not in ("cyclonedx", "licences"):
    sys.exit(__doc__)
kind, name = sys.argv[1:]
root = pathlib.Path(__file__).resolve().parent.parent
target = platform.machine() + "-unknown-linux-gnu"
metadata = json.loads(
    subprocess.check_output(
        [os.environ.get("CARGO", "cargo"), "metadata", "--locked", "--format-version=1", "--filter-platform", target],
        cwd=root,
    )
)
packages = {package["id"]: package for package in metadata["packages"]}
nodes = {node["id"]: node for node in metadata["resolve"]["nodes"]}


def is_linked(package):
    return not any("proc-macro" in target["kind"] for target in package["targets"])


def linked(start):
    """What is linked into it: normal dependencies, and theirs; not those of builds, tests and macros."""
    found, todo = set(), [start]
    while todo:
        one = todo.pop()
        if one in found or not is_linked(packages[one]):
            continue
        found.add(one)
        for dependency in nodes[one]["deps"]:
            if any(use["kind"] is None for use in dependency["dep_kinds"]):
                todo.append(dependency["pkg"])
    return sorted((packages[one] for one in found), key=lambda package: (package["name"], package["version"]))


start = next(id for id in metadata["workspace_members"] if packages[id]["name"] == name)
parts = [package for package in linked(start) if package["source"] is not None]

if kind == "cyclonedx":

    def component(package, kind):
        return {
            "type": kind,
            "bom-ref": f"pkg:cargo/{package['name']}@{package['version']}",
            "name": package["name"],
            "version": package["version"],
            "licenses": [{"expression": package["license"].replace("/", " OR ")}],
            "purl": f"pkg:cargo/{package['name']}@{package['version']}",
        }

    bom = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": {"component": component(packages[start], "application")},
        "components": [component(package, "library") for package in parts],
    }
    json.dump(bom, sys.stdout, indent=2)
    print()
    sys.exit()

print(f"{name} is licensed under MIT or Apache-2.0, as you choose.\n")
for file in ("LICENSE-MIT", "LICENSE-APACHE"):
    print((root / file).read_text())
print(f"These libraries are linked into {name}. Each has its own licence. A text that several of them share is shown once.\n")
texts = {}
for package in parts:
    folder = pathlib.Path(package["manifest_path"]).parent
    files = sorted(file for file in folder.iterdir() if file.name.upper().startswith(("LICENSE", "LICENCE", "COPYING", "NOTICE")))
    line = f"{package['name']} {package['version']}: {package['license']}"
    for file in files:
        if file.is_file():
            texts.setdefault(file.read_text(errors="replace").strip(), []).append(line)
    if not files:
        texts.setdefault("", []).append(line)
for text, lines in texts.items():
    print("-" * 78)
    print("\n".join(lines))
    print(f"\n{text}\n" if text else "\n(the library has no file with its licence)\n")
