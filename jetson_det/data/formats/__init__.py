def __getattr__(name):
    "`read_dataset` and `write_dataset` of the registry, imported when they are used."
    if name not in ("read_dataset", "write_dataset"):
        raise AttributeError("module 'jetson_det.data.formats' has no attribute {!r}".format(name))
    from . import registry
    return getattr(registry, name)
