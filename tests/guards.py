"""Takes the guards of docs/reliability.md away, one at a time, and sees their tests fail.

    python tests/guards.py                 # all of them, with the time each took
    python tests/guards.py fetching.py     # those whose file or test holds this text

Every guard goes in a copy of the repository, which is removed at the end. First all tests run in it as it is, and must
pass. A guard whose test passes without it is told, and makes the exit code 1. `make test` does not run this; there a
test sees that each fault of the table has its guard here, and that each guard is where this file says.
"""

import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# The test that must fail, the file of the guard, its text there (found once), and what stands in its place.
GUARDS = [
    (
        "test_sample.py::test_wrong_flags_are_refused_in_one_line",
        "cli.py",
        "def error(self, message):",
        "def argparse_prints_its_usage(self, message):",
    ),
    (
        "test_sample_ddp.py::test_wrong_flags_are_refused_in_one_line",
        "sample_ddp.py",
        "processes.by_first(lambda: check_writable(args.record))",
        "pass",
    ),
    (
        "test_train_router.py::test_bad_input_is_refused_in_one_line",
        "train_router.py",
        "if batch % draws:",
        "if False:",
    ),
    (
        "test_evaluator.py::test_inputs_that_cannot_be_used_are_refused_in_one_line",
        "evaluator.py",
        "if args.keep_features and not args.save_stats:",
        "if False:",
    ),
    (
        "test_download.py::test_an_unknown_name_exits_2_and_lists_the_names",
        "download.py",
        "unknown = [name for name in args.names if name not in names()]",
        "unknown = []",
    ),
    (
        "test_sample.py::test_wrong_files_are_refused_in_one_line",
        "sample.py",
        "schedule.check_fits(args.path, args.num_sampling_steps, dit.depth)",
        "pass",
    ),
    (
        "test_sampling.py::test_a_folder_with_a_damaged_configuration_is_refused",
        "sampling.py",
        'if not math.isfinite(config.get("cfg_scale", 1)):',
        "if False:",
    ),
    (
        "test_sampling.py::test_a_damaged_vae_or_one_of_another_model_is_refused",
        "sampling.py",
        "if (vae.config.latent_channels, spec.image_size) != (channels, size * pixels):",
        "if False:",
    ),
    (
        "test_router.py::test_files_that_are_no_router_are_refused",
        "router.py",
        "if not all(row.isfinite().all() for row in rows.values()):",
        "if False:",
    ),
    (
        "test_runs.py::test_what_cannot_be_continued_is_refused",
        "runs.py",
        'if not (fits and isinstance(saved["step"], int)):',
        "if False:",
    ),
    (
        "test_data.py::test_latents_of_another_vae_size_or_data_are_refused",
        "data.py",
        'if about["vae"] != vae_fingerprint:',
        "if False:",
    ),
    (
        "test_image_sets.py::test_what_is_no_set_of_images_is_refused",
        "image_sets.py",
        'if self.dtype != np.uint8 and self.dtype.kind != "f":',
        "if False:",
    ),
    (
        "test_evaluator.py::test_graph_files_that_cannot_be_used_are_refused",
        "features.py",
        "if self.path.name == PUBLISHED_GRAPH and not self.is_published:",
        "if False:",
    ),
    (
        "test_fuzz.py::test_a_mutated_file_is_used_or_refused_in_one_line[routers]",
        "files.py",
        "_check_tensors(loaded, size)\n        return loaded",
        "return loaded",
    ),
    (
        "test_faults.py::test_hostile_files_are_refused_and_nothing_runs",
        "files.py",
        "weights_only=True",
        "weights_only=False",
    ),
    (
        "test_faults.py::test_hostile_latents_shards_and_sets_are_refused_and_nothing_runs",
        "data.py",
        "allow_pickle=False",
        "allow_pickle=True",
    ),
    (
        "test_router.py::test_a_hostile_pickle_is_refused_and_does_not_run",
        "files.py",
        "weights_only=True",
        "weights_only=False",
    ),
    (
        "test_checkpoints.py::test_find_model_does_not_run_what_is_in_a_file",
        "files.py",
        "weights_only=True",
        "weights_only=False",
    ),
    (
        "test_image_sets.py::test_objects_are_not_unpickled",
        "npz.py",
        "_read_header(path, info, member)\n    with np.load(path, allow_pickle=False)",
        "pass\n    with np.load(path, allow_pickle=True)",
    ),
    (
        "test_faults.py::test_no_source_file_loads_anything_that_could_run_code",
        "npz.py",
        "allow_pickle=False",
        "allow_pickle=True",
    ),
    (
        "test_faults.py::test_a_file_that_cannot_be_written_to_its_end_is_one_line_and_is_not_left",
        "files.py",
        "part.unlink(missing_ok=True)",
        "pass",
    ),
    (
        "test_sample_ddp.py::test_a_full_disk_stops_it_in_one_line_and_loses_nothing",
        "sample_ddp.py",
        "except (UserError, KeyboardInterrupt, MemoryError, RuntimeError) as error:",
        "except (KeyboardInterrupt, MemoryError, RuntimeError) as error:",
    ),
    (
        "test_download.py::test_a_fault_of_the_disk_is_not_called_one_of_the_network",
        "fetching.py",
        "except OSError as error:  # those of the network are Failed",
        "except ZeroDivisionError as error:",
    ),
    (
        "test_faults.py::test_an_output_that_is_full_or_closed_is_one_line",
        "cli.py",
        "sys.stdout.flush()  # so that a full disk behind it is told here",
        "pass",
    ),
    (
        "test_faults.py::test_what_may_not_be_read_or_written_is_one_line",
        "files.py",
        "if isinstance(error, OSError) and error.strerror:",
        "if False:",
    ),
    (
        "test_sample_ddp.py::test_a_folder_that_cannot_be_written_is_refused",
        "shards.py",
        'except OSError as error:\n            raise UserError(f"cannot write into',
        'except ZeroDivisionError as error:\n            raise UserError(f"cannot write into',
    ),
    (
        "test_faults.py::test_too_little_memory_for_a_batch_names_the_flag_to_lower",
        "cli.py",
        "{f': pass {less}' if less else ''}",
        "",
    ),
    (
        "test_faults.py::test_a_batch_beyond_the_memory_that_a_process_may_take_is_one_line",
        "files.py",
        'texts = "can\'t allocate memory", "CUBLAS_STATUS_ALLOC_FAILED"',
        'texts = ("CUBLAS_STATUS_ALLOC_FAILED",)',
    ),
    (
        "test_evaluator.py::test_where_memory_is_short_smaller_batches_are_tried_and_said",
        "features.py",
        "if self.batch_size == 1 or not out_of_memory(error):",
        "if True:",
    ),
    (
        "test_metrics.py::test_without_memory_smaller_blocks_are_tried_and_said",
        "metrics.py",
        "if block == 1 or not out_of_memory(error):",
        "if True:",
    ),
    (
        "test_faults.py::test_too_little_memory_for_a_file_is_said_of_the_file",
        "files.py",
        "if out_of_memory(error):",
        "if False:",
    ),
    (
        "test_faults.py::test_a_data_loading_process_that_is_killed_is_one_line_and_the_last_update_is_kept",
        "train_router.py",
        "with contextlib.suppress(UserError):\n            save()",
        "with contextlib.suppress(UserError):\n            pass",
    ),
    (
        "test_faults.py::test_a_data_loading_process_that_is_gone_does_not_disturb_what_is_saved_then",
        "data.py",
        "signal.signal(signal.SIGCHLD, signal.SIG_DFL)",
        "pass",
    ),
    (
        "test_npz.py::test_a_header_that_says_more_than_there_is_is_refused_before_memory_is_taken",
        "npz.py",
        "prod(shape) * dtype.itemsize != info.file_size - member.tell()",
        "False",
    ),
    (
        "test_faults.py::test_a_packed_checkpoint_is_refused_before_memory_is_taken_for_it",
        "files.py",
        "if sum(member.file_size for member in archive.infolist()) > size:",
        "if False:",
    ),
    (
        "test_faults.py::test_weights_that_are_cut_off_after_they_were_read_stay_what_they_were",
        "sampling.py",
        "parameter.data = parameter.data.clone()",
        "parameter.data = parameter.data",
    ),
    (
        "test_faults.py::test_files_that_change_while_they_are_read_are_one_line",
        "cli.py",
        "if isinstance(error, OSError):",
        "if isinstance(error, ZeroDivisionError):",
    ),
    (
        "test_faults.py::test_latents_that_change_while_they_are_read_are_one_line",
        "data.py",
        "except (OSError, ValueError) as error:",
        "except ZeroDivisionError as error:",
    ),
    (
        "test_sample_ddp.py::test_a_damaged_shard_is_sampled_again_and_said",
        "shards.py",
        "bad.append((start, stop))",
        "pass",
    ),
    (
        "test_shards.py::test_a_shard_that_is_damaged_while_assembling_is_removed_and_no_file_is_left",
        "shards.py",
        "self.remove([(start, stop)])",
        "pass",
    ),
    (
        "test_train_router.py::test_a_damaged_image_is_named_and_more_than_one_percent_are_refused",
        "data.py",
        "if len(skipped) > 0.01 * len(data):",
        "if False:",
    ),
    (
        "test_data.py::test_an_unreadable_image_gives_way_to_the_next_and_is_named",
        "data.py",
        "except ValueError as error:",
        "except ZeroDivisionError as error:",
    ),
    (
        "test_train_router.py::test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint",
        "updates.py",
        "if not math.isfinite(error):",
        "if False:",
    ),
    (
        "test_faults.py::test_ctrl_c_at_any_stage_is_one_line_and_leaves_nothing_half_written"
        "[sample.py-PIL.Image.Image.save-more3]",
        "files.py",
        "part.unlink(missing_ok=True)",
        "pass",
    ),
    (
        "test_faults.py::test_a_process_that_is_interrupted_ends_with_code_130[evaluator.py-metrics.inception_score]",
        "cli.py",
        "except KeyboardInterrupt as interrupt:",
        "except ZeroDivisionError as interrupt:",
    ),
    (
        "test_train_router.py::test_a_run_that_is_stopped_saves_first_and_goes_on_in_its_folder",
        "train_router.py",
        "done or step % args.ckpt_every == 0",
        "step % args.ckpt_every == 0",
    ),
    (
        "test_sample_ddp.py::test_a_signal_stops_it_in_one_line_and_keeps_what_is_finished",
        "sample_ddp.py",
        "with cli.sigterm_interrupts():",
        "if True:",
    ),
    (
        "test_sample_ddp.py::test_killed_at_random_moments_it_continues_with_any_processes",
        "shards.py",
        "[*self.finished(), (self.count, self.count)]",
        "[(self.count, self.count)]",
    ),
    (
        "test_sample_ddp.py::test_killed_while_assembling_it_leaves_no_file_and_continues",
        "shards.py",
        '(self.npz.parent, f".{self.npz.name}.*.part"),',
        "",
    ),
    (
        "test_train_router.py::test_a_run_that_is_killed_ten_times_ends_with_the_router_of_an_unbroken_one",
        "updates.py",
        'self.optimizer.load_state_dict(state["opt"])',
        "pass",
    ),
    (
        "test_faults.py::test_processes_whose_peer_was_killed_leave_within_a_minute_with_one_line[train_router.py-0]",
        "processes.py",
        "except RuntimeError as error:",
        "except ZeroDivisionError as error:",
    ),
    (
        "test_faults.py::test_a_message_that_fails_is_one_line",
        "processes.py",
        "except RuntimeError as error:",
        "except ZeroDivisionError as error:",
    ),
    (
        "test_train_router.py::test_torchrun_restarts_a_killed_process_and_the_router_is_that_of_an_unbroken_run",
        "train_router.py",
        "if processes.launch:",
        "if False:",
    ),
    (
        "test_sample_ddp.py::test_nobody_waits_for_a_process_that_died",
        "sample_ddp.py",
        "pipeline.run(wait_for_others(images, processes, batch_size, show), show)",
        "wait_for_others(images, processes, batch_size, show)",
    ),
    (
        "test_sample_ddp.py::test_two_machines_share_the_work_and_go_on_when_one_of_them_dies",
        "shards.py",
        "[*self.finished(), (self.count, self.count)]",
        "[(self.count, self.count)]",
    ),
    (
        "test_processes.py::test_who_waits_in_vain_is_told_so",
        "processes.py",
        "time.monotonic() - since > self.PATIENCE",
        "False",
    ),
    (
        "test_sample_ddp.py::test_a_second_start_at_the_same_time_is_refused",
        "shards.py",
        "return True\n            raise",
        "return True\n            return True",
    ),
    ("test_runs.py::test_a_run_is_held_by_one_at_a_time", "runs.py", "if not self._lock:", "if False:"),
    (
        "test_download.py::test_without_a_network_the_program_says_one_line_and_exits_1",
        "download.py",
        "except fetching.Failed as error:",
        "except ZeroDivisionError as error:",
    ),
    (
        "test_download.py::test_a_refused_connection_is_a_fault_of_the_network_and_not_of_the_disk",
        "fetching.py",
        "with _network():\n            return",
        "if True:\n            return",
    ),
    (
        "test_download.py::test_a_silent_server_is_given_up",
        "fetching.py",
        "except (OSError, http.client.HTTPException) as error:",
        "except ZeroDivisionError as error:",
    ),
    (
        "test_download.py::test_a_wrong_file_that_is_there_is_refused_and_kept[hash]",
        "download.py",
        "if expected not in (None, actual):",
        "if False:",
    ),
    (
        "test_download.py::test_a_wrong_file_that_is_there_is_refused_and_kept[size]",
        "download.py",
        "if file.size not in (None, stat.st_size):",
        "if False:",
    ),
    (
        "test_fetching.py::test_a_cut_connection_is_gone_on_with_where_it_was_cut",
        "fetching.py",
        ' of {size} bytes", again=True)',
        ' of {size} bytes")',
    ),
    (
        "test_fetching.py::test_a_silent_server_is_asked_again",
        "fetching.py",
        "except (OSError, http.client.HTTPException) as error:",
        "except ZeroDivisionError as error:",
    ),
    (
        "test_fetching.py::test_a_fault_that_may_pass_is_tried_again_later_and_later",
        "fetching.py",
        "passing = error.code in (408, 429) or error.code >= 500",
        "passing = False",
    ),
    (
        "test_fetching.py::test_tries_are_few",
        "fetching.py",
        "if not again or failures >= TRIES:",
        "if not again or failures >= 10 * TRIES:",
    ),
    (
        "test_fetching.py::test_a_server_says_how_long_to_wait_within_limits",
        "fetching.py",
        "float(asked) if asked.isdecimal() else 0.0",
        "0.0",
    ),
    (
        "test_fetching.py::test_a_server_that_never_gets_to_the_end_is_given_up",
        "fetching.py",
        "if reached >= farthest + BLOCK:",
        "if reached > farthest:",
    ),
    (
        "test_fetching.py::test_a_fault_that_stays_is_not",
        "fetching.py",
        "again = error.again or (error.unreached and came)",
        "again = True",
    ),
    (
        "test_fetching.py::test_where_nobody_answers_it_ends_at_once",
        "fetching.py",
        " and not isinstance(error.reason, ConnectionRefusedError)",
        "",
    ),
    (
        "test_fetching.py::test_redirections_that_lead_nowhere_are_refused",
        "fetching.py",
        "except (ValueError, http.client.InvalidURL) as error:",
        "except ZeroDivisionError as error:",
    ),
    (
        "test_fetching.py::test_a_process_that_is_stopped_leaves_its_part_to_the_next",
        "fetching.py",
        "known = _known(part, url, size, sha256)",
        "known = None",
    ),
    ("test_fetching.py::test_the_next_start_goes_on_with_what_was_left", "fetching.py", "if start:", "if False:"),
    (
        "test_fetching.py::test_a_server_that_knows_no_ranges_sends_all_of_it_again",
        "fetching.py",
        "written.truncate(0)",
        "pass",
    ),
    (
        "test_fetching.py::test_a_range_that_is_not_the_rest_is_not_used",
        "fetching.py",
        'ranged != f"bytes {start}-{size - 1}/{size}" or ',
        "",
    ),
    (
        "test_fetching.py::test_a_server_that_lies_about_ranges_each_time_is_given_up",
        "fetching.py",
        "if from_zero:",
        "if False:",
    ),
    (
        "test_fetching.py::test_another_size_is_refused_before_anything_is_taken",
        "fetching.py",
        "if size is not None and offered not in (None, size):",
        "if False:",
    ),
    (
        "test_fetching.py::test_without_any_size_a_cut_would_go_unseen",
        "fetching.py",
        'raise Failed("the server does not say how large it is, so a cut would go unseen")',
        "return 0",
    ),
    (
        "test_fetching.py::test_a_file_that_changed_meanwhile_is_fetched_anew_and_never_mixed",
        "fetching.py",
        "written.truncate(0)",
        "pass",
    ),
    (
        "test_fetching.py::test_without_a_mark_only_a_hash_makes_it_safe_to_go_on",
        "fetching.py",
        ' and (known["mark"] or sha256)',
        "",
    ),
    (
        "test_fetching.py::test_another_file_is_kept_aside_and_replaced_by_the_next",
        "fetching.py",
        "if sha256 in (None, actual):",
        "if True:",
    ),
    (
        "test_fetching.py::test_another_file_that_came_in_parts_is_asked_for_once_more_and_then_refused",
        "fetching.py",
        "if from_zero or not continued:",
        "if True:",
    ),
    (
        "test_download.py::test_what_does_not_fit_on_the_disk_is_not_begun",
        "fetching.py",
        "if usage.total and size > usage.free:",
        "if False:",
    ),
    (
        "test_fetching.py::test_a_disk_that_fills_up_is_one_line_and_what_came_is_kept",
        "fetching.py",
        "except OSError as error:",
        "except ZeroDivisionError as error:",
    ),
    (
        "test_fetching.py::test_several_processes_fetch_once",
        "download.py",
        "if _is_there(file):\n            return",
        "if False:\n            return",
    ),
    (
        "test_fetching.py::test_without_locks_each_fetches_for_itself_and_nothing_collides",
        "fetching.py",
        'path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")',
        "_part(path)",
    ),
    (
        "test_download.py::test_a_file_that_was_hashed_is_not_hashed_again_until_its_time_changes",
        "download.py",
        ", {stat.st_mtime_ns} ns",
        "",
    ),
    (
        "test_download.py::test_a_kept_hash_is_compared_with_the_file_and_with_the_next_fetch",
        "download.py",
        "expected = _expected_sha256(file)",
        "expected = file.sha256",
    ),
    (
        "test_download.py::test_a_name_or_folder_that_could_lead_elsewhere_cannot_be_in_a_table",
        "download.py",
        "if not PLAIN.fullmatch(part):",
        "if False:",
    ),
    (
        "test_sampling.py::test_what_a_model_was_not_trained_for_is_refused",
        "sampling.py",
        "check_sampler(dit, cfg_scale, ancestral)\n    denoise",
        "denoise",
    ),
    (
        "test_download.py::test_a_full_disk_below_the_hub_is_not_called_a_fault_of_the_network",
        "download.py",
        "if isinstance(error, OSError) and error.errno in DISK:",
        "if False:",
    ),
    (
        "test_fetching.py::test_a_server_that_is_out_of_reach_for_a_while_is_asked_again",
        "fetching.py",
        "again = error.again or (error.unreached and came)",
        "again = error.again",
    ),
    (
        "test_fetching.py::test_a_fault_that_stays_says_what_is_kept",
        "fetching.py",
        "if not again and not reached:",
        "if not again:",
    ),
    (
        "test_fetching.py::test_an_address_that_is_none_is_a_fault_of_the_address",
        "fetching.py",
        "with _network():\n        request",
        "if True:\n        request",
    ),
    (
        "test_fetching.py::test_a_file_with_a_hash_is_gone_on_with_from_another_address",
        "fetching.py",
        'known["mark"] = None',
        "return None",
    ),
    (
        "test_fetching.py::test_what_is_empty_or_packed_is_not_taken_for_the_file",
        "fetching.py",
        "if size is None and offered == 0:",
        "if False:",
    ),
]


def copied(folder):
    """Copies what git tracks, or would, to `folder`."""
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in names:
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)


def run(folder, tests):
    """pytest's exit code for `tests` in `folder`, and what it printed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", *(f"tests/{test}" for test in tests)]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return result.returncode, result.stdout + result.stderr


def main():
    asked = sys.argv[1:] or [""]
    guards = [guard for guard in GUARDS if any(text in guard[0] or text in guard[1] for text in asked)]
    unseen = 0
    with tempfile.TemporaryDirectory() as folder:
        copied(Path(folder))
        code, printed = run(folder, dict.fromkeys(guard[0] for guard in guards))
        if code:
            sys.exit(f"{printed}\nthese tests do not pass with all guards in place")
        for test, name, text, without in guards:
            path, start = Path(folder) / name, time.perf_counter()
            whole = path.read_text()
            assert whole.count(text) == 1, f"{name} has {text!r} {whole.count(text)} times"
            path.write_text(whole.replace(text, without))
            code, printed = run(folder, [test])
            path.write_text(whole)
            unseen += code != 1  # 2 and more: pytest itself failed
            said = "fails" if code == 1 else f"DOES NOT FAIL (pytest's exit code {code})"
            print(f"{time.perf_counter() - start:5.1f} s  {name}: {test} {said}", flush=True)
    print(f"{len(guards) - unseen} of {len(guards)} guards are seen by their tests")
    sys.exit(unseen > 0)


if __name__ == "__main__":
    main()
