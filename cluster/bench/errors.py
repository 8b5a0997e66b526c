"""What a user of `diptych bench` can get wrong, and what an endpoint can do to it before the load begins.

DiptychError
└── BenchError
    ├── WorkloadError     a trace row, a length or a rate that cannot be used: exit code 2
    ├── PromptError       prompts of that length cannot be made: exit code 2
    ├── TransferBenchError   `bench transfer`: a transport that cannot be used here, or that stopped working: exit code 2
    └── EndpointError     nobody answers at the URL, or not as an OpenAI server does: exit code 3

Once the load runs nothing is raised: what goes wrong with a request is written in its record.
"""

from ...messages.errors import DiptychError


class BenchError(DiptychError):
    pass


class WorkloadError(BenchError):
    pass


class PromptError(BenchError):
    pass


class TransferBenchError(BenchError):
    pass


class EndpointError(BenchError):
    pass
