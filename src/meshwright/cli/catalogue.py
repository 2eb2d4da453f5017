"""meshwright models, meshwright clusters"""

from __future__ import annotations

from meshwright.cli.shared import AsJson, print_json, show


def models(json: AsJson = False) -> None:
    """List the models of the catalogue."""
    from dataclasses import asdict

    from meshwright.report.catalogue import models_table
    from meshwright.spec.huggingface import catalogue_models, load_model
    from meshwright.spec.parameters import count_parameters

    every = [load_model(name) for name in catalogue_models()]
    if json:
        print_json([{**asdict(m), "parameters": asdict(count_parameters(m))} for m in every])
    else:
        show(models_table(every))


def clusters(json: AsJson = False) -> None:
    """List the clusters of the catalogue."""
    from meshwright.report.catalogue import clusters_table
    from meshwright.spec.catalogue import catalogue_clusters, load_cluster

    every = [load_cluster(name) for name in catalogue_clusters()]
    if json:
        print_json([c.model_dump(mode="json") for c in every])
    else:
        show(clusters_table(every))
