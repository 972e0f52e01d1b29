"""Changing graphs: EvolveGCN, what it has to beat, and how forecasts of edges are measured."""

from pantarhei.systems.evolving_graphs.baselines import (
    GCN,
    GCNGRU,
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
    dense_scores,
    ranking,
)
from pantarhei.systems.evolving_graphs.model import EvolveGCN
from pantarhei.systems.evolving_graphs.negatives import negatives

__all__ = [
    "GCN",
    "GCNGRU",
    "BlockScores",
    "Embedded",
    "EvolveGCN",
    "Graph",
    "MatrixGRU",
    "MatrixLSTM",
    "NodeHead",
    "PairHead",
    "SparseScores",
    "StaticMLP",
    "Summary",
    "average",
    "class_weighted_loss",
    "dense_scores",
    "edge_bank",
    "graph_of",
    "graphs_of",
    "negatives",
    "normalized_adjacency",
    "preferential_attachment",
    "ranking",
]
