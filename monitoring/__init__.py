"""What a run tells the outside world: metric catalogue, sinks, Prometheus, Grafana."""
