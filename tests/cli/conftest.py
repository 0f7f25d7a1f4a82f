import pytest

from medsiglip_jax import cli


@pytest.fixture
def run(capsys):
    """Runs a command line in this process -> (exit code, stdout, stderr)."""

    def call(*argv):
        code = cli.main([str(a) for a in argv])
        out, err = capsys.readouterr()
        assert "Traceback" not in err
        return code, out, err

    return call
