"""Processes of their own for tests, forked from one Python that has imported the large libraries once."""

import json
import subprocess
import sys

SERVER = """
import json, os, sys, tempfile, traceback

exec(sys.argv[1], globals())
answers = os.fdopen(os.dup(1), "w")
for line in sys.stdin:
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        if not (child := os.fork()):
            for place, descriptor in enumerate((os.open(os.devnull, os.O_RDONLY), output.fileno(), errors.fileno())):
                os.dup2(descriptor, place)
            code = 0
            try:
                exec(compile(json.loads(line), "test", "exec"), {"__name__": "test"})
            except SystemExit as end:
                code = end.code or 0
            except BaseException:
                traceback.print_exc()
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        printed = []
        for file in (output, errors):
            file.seek(0)
            printed.append(file.read())
    answers.write(json.dumps([code, *printed]) + "\\n")
    answers.flush()
"""


class WarmPython:
    """A context manager.

    Args:
        imports: code that runs once, before all else; what it names is in the module ``__main__``.
        options: of `subprocess.Popen`.
    """

    def __init__(self, imports, **options):
        self._command = [sys.executable, "-c", SERVER, imports]
        self._options = options

    def run(self, code):
        """Runs code in a process of its own, as `subprocess.run` does."""
        self._server.stdin.write(json.dumps(code) + "\n")
        self._server.stdin.flush()
        return subprocess.CompletedProcess(code, *json.loads(self._server.stdout.readline()))

    def __enter__(self):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._server = subprocess.Popen(self._command, **pipes, **self._options)
        return self

    def __exit__(self, *_):
        self._server.communicate(timeout=10)
