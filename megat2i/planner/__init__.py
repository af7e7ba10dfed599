"""Memory and time of a training layout on a cluster, by arithmetic; compared with measured and published runs."""
