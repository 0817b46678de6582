"""The SDK's calls over our own connections, its failures in our words."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dinov3.errors import StoreError
from dinov3.lake.refusal import detail_of, refused
from dinov3.lake.wire import Wire

if TYPE_CHECKING:
    import lakefs_sdk


@dataclass(frozen=True)
class Sdk:
    """What we use of the SDK; it is imported when the first server is spoken to."""

    wire: Wire
    models: Any  # the module that holds what is sent
    branches: "lakefs_sdk.BranchesApi"
    commits: "lakefs_sdk.CommitsApi"
    config: "lakefs_sdk.ConfigApi"
    objects: "lakefs_sdk.ObjectsApi"
    refs: "lakefs_sdk.RefsApi"
    repositories: "lakefs_sdk.RepositoriesApi"
    tags: "lakefs_sdk.TagsApi"

    def call(
        self,
        what: str,
        call: Callable[..., Any],
        *arguments: Any,
        expected: Mapping[int, object] | None = None,
        **options: Any,
    ) -> Any:
        """Makes one call.

        Args:
            what: Names its object in an error.
            call: A method of the SDK.
            *arguments: Its arguments.
            expected: The answer in place of an error of that HTTP status.
            **options: Its options.

        Raises:
            StoreError: The server failed, refused, or is none.
        """
        from lakefs_sdk.exceptions import ApiException

        try:
            with self.wire.explained(what), _checked(what):
                return call(*arguments, **options)
        except ApiException as error:
            if expected is not None and error.status in expected:
                return expected[error.status]
            raise refused(what, error.status, error.body) from error

    def model(self, what: str, kind: str, **fields: Any) -> Any:
        """Something to send, of one of the SDK's classes.

        Raises:
            StoreError: A field is not of its form.
        """
        with _checked(what):
            return getattr(self.models, kind)(**fields)


@contextmanager
def _checked(what: str) -> Iterator[None]:
    """Tells what the SDK's own checks of names and answers say."""
    try:
        yield
    except ValueError as error:
        detail = detail_of(str(error))
        msg = f"{what}: not a name or an answer lakeFS knows, got {detail}. Check both."
        raise StoreError(msg) from error


def make_sdk(endpoint: str, access_key: str, secret_key: str, timeout: float) -> Sdk:
    """Connects the SDK to a server.

    Raises:
        StoreError: The SDK is not installed.
    """
    try:
        import lakefs_sdk
    except ImportError as error:
        msg = "lakefs: the SDK is not installed. Install dinov3[lakefs]."
        raise StoreError(msg) from error
    configuration = lakefs_sdk.Configuration(
        host=f"{endpoint}/api/v1", username=access_key, password=secret_key
    )
    client = lakefs_sdk.ApiClient(configuration)
    wire = client.rest_client.pool_manager = Wire(endpoint, access_key, secret_key, timeout)
    return Sdk(
        wire,
        lakefs_sdk,
        branches=lakefs_sdk.BranchesApi(client),
        commits=lakefs_sdk.CommitsApi(client),
        config=lakefs_sdk.ConfigApi(client),
        objects=lakefs_sdk.ObjectsApi(client),
        refs=lakefs_sdk.RefsApi(client),
        repositories=lakefs_sdk.RepositoriesApi(client),
        tags=lakefs_sdk.TagsApi(client),
    )
