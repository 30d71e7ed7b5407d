"""What a user writes: `modelfiles/NAME/recipe.yaml`.

recipe = load(folder / "recipe.yaml", overrides=["train.epochs=3"])
recipe.train.rank, recipe.origin("train.rank")      # 16, "recipe.yaml:5" or "--set" or "default"
"""

from olpack.recipe.reader import load, of_data
from olpack.recipe.schema import Compare, Data, Export, Modelfile, Recipe, Train, json_schema

__all__ = ["Compare", "Data", "Export", "Modelfile", "Recipe", "Train", "json_schema", "load", "of_data"]
