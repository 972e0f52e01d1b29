"""Changing graphs: EvolveGCN, what it has to beat, and how forecasts of edges are measured."""

from pantarhei.systems.evolving_graphs.baselines import (
    GCN,
    GCNGRU,
    Roland,
    StaticMLP,
    edge_bank,
    preferential_attachment,
)
from pantarhei.systems.evolving_graphs.cells import MatrixGRU, MatrixLSTM, Summary
from pantarhei.systems.evolving_graphs.graphs import (
    Embedded,
    Graph,
    graph_of,
    graphs_of,
    normalized_adjacency,
)
from pantarhei.systems.evolving_graphs.heads import NodeHead, PairHead, class_weighted_loss
from pantarhei.systems.evolving_graphs.metrics import (
    BlockScores,
    SparseScores,
    average,
    classification,
    dense_scores,
    ranking,
)
from pantarhei.systems.evolving_graphs.model import EvolveGCN
from pantarhei.systems.evolving_graphs.negatives import negatives
from pantarhei.systems.evolving_graphs.training import (
    MODELS,
    Forecaster,
    Problem,
    Trained,
    build,
    evaluate,
    evaluate_rule,
    majority,
    train,
)

__all__ = [
    "GCN",
    "GCNGRU",
    "MODELS",
    "BlockScores",
    "Embedded",
    "EvolveGCN",
    "Forecaster",
    "Graph",
    "MatrixGRU",
    "MatrixLSTM",
    "NodeHead",
    "PairHead",
    "Problem",
    "Roland",
    "SparseScores",
    "StaticMLP",
    "Summary",
    "Trained",
    "average",
    "build",
    "class_weighted_loss",
    "classification",
    "dense_scores",
    "edge_bank",
    "evaluate",
    "evaluate_rule",
    "graph_of",
    "graphs_of",
    "majority",
    "negatives",
    "normalized_adjacency",
    "preferential_attachment",
    "ranking",
    "train",
]
