"""The reference pages of the site, as Markdown made from the code: every verb and every setting.

They are made each time the site is built, so they can't be out of date.
"""
import re

PANEL = "Other"


def cell(text):
    "A text as the cell of a table: one line, with no bar and no tag of HTML."
    return re.sub(r"\s+", " ", str(text)).replace("|", "\\|").replace("<", "&lt;").strip()


def code_cell(text):
    "A text as code in the cell of a table."
    return "`" + re.sub(r"\s+", " ", str(text)).replace("|", "\\|").replace("`", "'").strip() + "`"


def table(header, rows):
    "A table of Markdown."
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def page(title, subtitle, blocks):
    "A page that opens like those of the notebooks."
    return "\n\n".join(["# " + title, "> " + subtitle, *blocks]) + "\n"


# ---- verbs

def verbs(group, words=("jetson-det",)):
    "(words, command) of each verb of a click group, those of its groups too, in the order of `--help`."
    context = group.make_context(" ".join(words), [], resilient_parsing=True)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command.hidden: continue
        if hasattr(command, "list_commands"): yield from verbs(command, (*words, name))
        else: yield (*words, name), command


def option_rows(command):
    "The rows of a verb's arguments and options."
    rows = []
    for p in command.params:
        if p.name == "help": continue
        name = ", ".join([*p.opts, *p.secondary_opts]) if p.opts[0].startswith("-") else p.metavar or p.name.upper()
        default = p.default if p.default not in (None, False, (), [], "") and not callable(p.default) else ""
        text = (getattr(p, "help", "") or "") + (" (required)" if p.required else "")
        rows.append([code_cell(name), cell(text), code_cell(default) if default != "" else ""])
    return rows


def commands_page():
    "Every verb of `jetson-det` with its arguments and options."
    import typer
    from jetson_det.cli import app
    panels = {}
    for words, command in verbs(typer.main.get_command(app)):
        text = [f"### {' '.join(words)}", (command.help or "").strip()]
        rows = option_rows(command)
        if rows: text.append(table(["argument or option", "meaning", "default"], rows))
        panels.setdefault(command.rich_help_panel or panel_of(app, words[1]), []).append("\n\n".join(text))
    blocks = [
        "Each verb is one Python call too: its notebook says which. Exit codes: 0 is done; 1, the work failed its own"
        " check; 2, the input or the call was wrong, and one line on standard error says what. `--debug` before the"
        " verb shows the traceback."
    ]
    for panel, texts in panels.items(): blocks += ["## " + panel, *texts]
    return page("Commands", "Every verb of `jetson-det`, with its arguments and options", blocks)


def panel_of(app, name):
    "The panel of `--help` in which a group of verbs stands."
    for group in app.registered_groups:
        if group.name == name and isinstance(group.rich_help_panel, str): return group.rich_help_panel
    return PANEL


# ---- settings

def settings_page():
    "Every setting of the config."
    from jetson_det.config import Config
    from jetson_det.config_tools import as_yaml, explain
    sections = {}
    for s in explain():
        section, name = s.key.split(".")
        row = [code_cell(name), code_cell(as_yaml(s.default)), cell(s.description), cell(s.allowed)]
        sections.setdefault(section, []).append(row)
    blocks = [
        "Set them in a YAML file (`jetson-det train -c config.yaml`) or on the command line"
        " (`jetson-det train train.epochs=50`). `jetson-det config explain train.lr` prints one of them, and where its"
        " value comes from. [The page of the settings](config.md) says why the defaults are what they are."
    ]
    for section, rows in sections.items():
        about = (Config.model_fields[section].annotation.__doc__ or "").strip()
        blocks += [f"## {section}", about, table(["key", "default", "meaning", "valid"], rows)]
    return page("Settings", "Every key of the config, with its default, meaning and valid values", blocks)


PAGES = {"commands.md": ("Commands", commands_page), "settings.md": ("Settings", settings_page)}
