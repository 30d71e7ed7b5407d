"""From GGUF files to tags of an Ollama server, and the proof that the served prompt is the trained prompt.

    check_name("coding-assistant"); check_parameters({"temperature": 0.2})    # before any work
    text = render(package, gguf_path, template_source)                        # the Modelfile, an artefact
    client = OllamaClient(); client.require()                                 # olpack.deploy.client
    register(client, "coding-assistant", files, package)                      # olpack.deploy.register
    smoke(client, "coding-assistant:q4_K_M", messages)                        # olpack.deploy.smoke
    check_identity(client, "coding-assistant:q4_K_M", tokenizer)              # olpack.deploy.prompt_identity
    write_store(folder, "coding-assistant", files, package)                   # olpack.deploy.ollama_store: without a server
    bundle("coding-assistant", files, modelfiles, report, zip_path)           # olpack.deploy.bundle: for a machine without olpack
    push_to_ollama(client, ["coding-assistant"], "me")                        # olpack.deploy.push; to the Hub: olpack.deploy.hub
    remove(client, "coding-assistant", records)                               # olpack.deploy.remove

Code that calls the server is imported from its module, so that checking a recipe loads no HTTP library.
"""

from olpack.deploy.modelfile import Package, ParsedModelfile, differences, parse, render, unrepresentable
from olpack.deploy.names import check_name, same
from olpack.deploy.parameters import PARAMETERS, check_parameters, context_warnings

__all__ = [
    "PARAMETERS",
    "Package",
    "ParsedModelfile",
    "check_name",
    "check_parameters",
    "context_warnings",
    "differences",
    "parse",
    "render",
    "same",
    "unrepresentable",
]
