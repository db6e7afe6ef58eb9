"""A Ray cluster of several nodes on this machine, for tests: prints its address, then obeys.

A line `kill N` kills node N, `add` adds one, the end of the input ends it.
"""

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    print(cluster.address, flush=True)
    for line in sys.stdin:
        action, *which = line.split()
        if action == "kill":
            cluster.remove_node(nodes[int(which[0])], allow_graceful=False)
        else:
            nodes.append(cluster.add_node(num_cpus=1))
        print("done", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
