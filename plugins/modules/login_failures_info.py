#!/usr/bin/python
# Copyright (c) 2026, fleet.portknock contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
from __future__ import annotations

DOCUMENTATION = r"""
module: login_failures_info
short_description: Count the failed ssh logins of a period, by source and user
version_added: 0.1.0
description:
  - Reads what sshd wrote into the systemd journal, or into the log files of a syslog daemon, and counts each failed attempt once,
    however many lines it left. Changes nothing.
  - Two periods can be compared, such as the week before and the week after a host was hardened.
  - A connection counts for the period in which sshd first wrote of it.
  - Needs root on the host.
author:
  - fleet.portknock contributors (@fleet-portknock)
extends_documentation_fragment:
  - fleet.portknock.attributes
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  idempotent:
    support: full
  async:
    support: full
options:
  since:
    description:
      - How long ago the period began, as a whole number with a unit of V(s), V(m), V(h), V(d) or V(w); without a unit in seconds.
    type: str
    default: 24h
  until:
    description:
      - How long ago it ended, likewise. V(0) is now.
    type: str
    default: '0'
  log_files:
    description:
      - Read these files and not the journal. Absolute paths, which may have wildcards; what gzip compressed is read, too.
      - Without it the journal is read. Where there is none, where it has nothing of sshd for this period, and where it begins
        after O(since) and the files begin earlier, the files V(/var/log/auth.log*) and V(/var/log/secure*) are read.
      - Lines with RFC 3339 times and with syslog's own. The latter have no year and no time zone. They are taken for the last
        such time before the file was last written, in the host's time zone, so that a file of more than a year is misread.
    type: list
    elements: str
notes:
  - User names are shown as sshd wrote them, at most the first 100 characters, and somebody may have typed a password there.
  - With C(LogLevel) V(QUIET), V(FATAL) or V(ERROR) sshd leaves out most of what is counted here. With V(VERBOSE) and above the
    counts are the same as with V(INFO), and the reasons more exact.
  - A connection that sshd ends after C(LoginGraceTime) leaves nothing in the log of Debian 11 and 12, unless it named an unknown
    user or was refused a password before.
seealso:
  - module: fleet.portknock.knock_gate_info
"""

EXAMPLES = r"""
- name: Count what failed since yesterday
  fleet.portknock.login_failures_info:
  become: true
  register: found

- name: Name the ten that tried most
  ansible.builtin.debug:
    msg: "{{ found.failures[:10] }}"

- name: Count the week before the last
  fleet.portknock.login_failures_info:
    since: 14d
    until: 7d
  become: true
  register: before

- name: Read an archive
  fleet.portknock.login_failures_info:
    since: 30d
    log_files: [/srv/archive/auth.log*]
  become: true
"""

RETURN = r"""
failures:
  description:
    - Failed attempts by source and user, those with the most first, then by source. At most 5,000; the rest is in RV(other).
  returned: always
  type: list
  elements: dict
  contains:
    source:
      description: Address, with its interface where that belongs to it; V(null) where sshd didn't say.
      type: str
    user:
      description: The name that was tried, as sshd wrote it; V(null) where sshd didn't say.
      type: str
    invalid_user:
      description: Whether the host has no such account.
      type: bool
    count:
      description: Failed attempts.
      type: int
    connections:
      description: Connections that these were made in.
      type: int
    first:
      description: When sshd first wrote of the first of these connections, in UTC.
      type: str
    last:
      description: When sshd last wrote of the last one, in UTC.
      type: str
    reasons:
      description:
        - The count, by what was refused. Each try of a V(password) or by V(keyboard_interactive) counts. A connection without
          such a try counts once, by the first of these that sshd wrote of it.
        - V(root_refused) by C(PermitRootLogin); V(not_allowed) by C(AllowUsers) and the like, a shell or PAM's account rules;
          V(gssapi); V(hostbased); V(publickey); V(too_many_attempts); V(timeout) of C(LoginGraceTime); V(gave_up), after
          which the other side left without anything refused that sshd told of, which is how refused keys mostly look;
          V(unfinished), where sshd wrote of no end.
      type: dict
  sample:
    - source: 203.0.113.7
      user: root
      invalid_user: false
      count: 12
      connections: 3
      first: '2026-11-20T03:12:45Z'
      last: '2026-11-21T17:02:11Z'
      reasons:
        password: 11
        gave_up: 1
connections_without_login:
  description:
    - Connections that never came to a user's name, such as scans, by source and in the same order.
  returned: always
  type: list
  elements: dict
  contains:
    source:
      description: Address, V(null) where sshd didn't say.
      type: str
    count:
      description: Connections.
      type: int
    first:
      description: When sshd first wrote of one, in UTC.
      type: str
    last:
      description: When sshd last wrote of one, in UTC.
      type: str
    reasons:
      description:
        - The count, by how they ended. V(closed) by the other side; V(banner), not the ssh protocol; V(negotiation), no algorithm
          in common; V(timeout); V(dropped) by C(MaxStartups), C(PerSourcePenalties) or C(hosts.deny) before anything was said.
      type: dict
other:
  description: What was counted, and is in none of the rows because there were too many.
  returned: always
  type: dict
  contains:
    failures:
      description: Failed attempts.
      type: int
    connections_without_login:
      description: Connections.
      type: int
totals:
  description: The whole period.
  returned: always
  type: dict
  contains:
    failures:
      description: Failed attempts.
      type: int
    connections:
      description: Connections that these were made in.
      type: int
    reasons:
      description: The failed attempts by reason.
      type: dict
    connections_without_login:
      description: Connections that never came to a user's name.
      type: int
    logins:
      description: Logins that succeeded, Ansible's own among them.
      type: int
period:
  description: What O(since) and O(until) come to, in UTC.
  returned: always
  type: dict
  contains:
    since:
      description: Beginning.
      type: str
    until:
      description: End.
      type: str
read_from:
  description: V(journal), or the paths of the files that were read.
  returned: always
  type: list
  elements: str
notes:
  description:
    - Sentences that say what is missing, such as where the log begins after the period does. Empty where nothing is known to be.
  returned: always
  type: list
  elements: str
"""

import os
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.fleet.portknock.plugins.module_utils._errors import PortknockError
from ansible_collections.fleet.portknock.plugins.module_utils._login_failures import login_failures


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "since": {"type": "str", "default": "24h"},
            "until": {"type": "str", "default": "0"},
            "log_files": {"type": "list", "elements": "str"},
        },
        supports_check_mode=True,
    )
    if os.geteuid() != 0:
        # Without root the journal shows less, and doesn't say so.
        module.fail_json(msg="become: expected to run as root, who can read all of the log; got another user.")
    try:
        found = login_failures(module.params["since"], module.params["until"], module.params["log_files"], time.time())
    except PortknockError as exc:
        module.fail_json(msg=str(exc))
    module.exit_json(changed=False, **found)


if __name__ == "__main__":
    main()
