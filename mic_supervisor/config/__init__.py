"""gpus.yaml and the daemon's own settings: reading, merging, checking, with the location of each
error.

`load.load` reads the file, `settings.load_settings` the MIC_* variables, `schema.json_schema` tells
an editor what both this package and the backends accept. Nothing here touches hardware.
"""
