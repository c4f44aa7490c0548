"""An ADS server as a process of its own, so that a test can kill it as flyd is killed.

    python -m tests.support.ads_process ADDRESS FILE

serves the EdgeConfig in FILE (JSON) at ADDRESS until it is killed.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from flyd.edge.resources import EdgeConfig
from flyd.edge.xds import AdsServer
from flyd.model import decode


async def main(address: str, file: str) -> None:
    ads = AdsServer(address)
    await ads.start()
    ads.publish(decode(Path(file).read_bytes(), EdgeConfig))
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2]))
