import os

import pytest
from slurm.cluster import SlurmCluster, missing_programs


@pytest.fixture(scope="session")
def slurm():
    """A running two-node cluster; CI must have the packages."""
    if missing := missing_programs():
        reason = f"not installed: {', '.join(missing)} (Debian packages munge slurmctld slurmd slurm-client)"
        pytest.fail(reason) if os.environ.get("CI") == "true" else pytest.skip(reason)
    with SlurmCluster(nodes=2) as running:
        yield running
