"""Registration of saved models in the transformers library.

    import ddiff.hf
    model = AutoModel.from_pretrained(folder)      # folder of run.save_pretrained, or a hub name

transformers has no entry points, so that it knows the classes only after this import. The network
is then built from the installed plugins, and no Python file of the folder is run.
"""

from ddiff.runs.hub.registration import register_models

register_models()
