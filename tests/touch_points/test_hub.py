"""Touch points in huggingface_hub: its client and commits."""


def test_22_one_client_with_a_time_limit():
    from huggingface_hub import get_session

    from trl_ama.common import hub

    before = get_session().timeout
    with hub.time_limit():
        assert get_session().timeout.read == hub.TIMEOUT
        assert hub._limit_request in get_session().event_hooks["request"]
    assert get_session().timeout == before and hub._limit_request not in get_session().event_hooks["request"]
    request = get_session().build_request("GET", "http://127.0.0.1", timeout=None)
    hub._limit_request(request)
    assert set(request.extensions["timeout"].values()) == {hub.TIMEOUT}


def test_23_files_that_are_there_make_no_commit(hub, tmp_path):
    from huggingface_hub import HfApi

    (tmp_path / "weights.safetensors").write_bytes(b"some weights")
    (tmp_path / "README.md").write_text("A card")
    HfApi().create_repo("org/twice")
    for _ in range(2):
        HfApi().upload_folder(repo_id="org/twice", folder_path=tmp_path)
    assert len(hub.commits("model", "org/twice")) == 2  # the one that made the repository, and one


def test_79_a_new_client_comes_from_a_factory(monkeypatch):
    from huggingface_hub import get_session
    from huggingface_hub.utils import _http

    made = []
    theirs = _http._GLOBAL_CLIENT_FACTORY
    monkeypatch.setattr(_http, "_GLOBAL_CLIENT_FACTORY", lambda: made.append(1) or theirs())
    _http.close_session()
    get_session()
    assert made == [1]
