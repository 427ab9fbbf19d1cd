// Command argocd answers what Argo CD's own code makes of objects: a list of questions as JSON on its standard input, a list of
// answers on its standard output. Health and actions are what argocd-cm.yaml gives to a kind of object.
package main

import (
	"encoding/json"
	"fmt"
	"os"

	"github.com/argoproj/argo-cd/v3/pkg/apiclient/application"
	appv1 "github.com/argoproj/argo-cd/v3/pkg/apis/application/v1alpha1"
	"github.com/argoproj/argo-cd/v3/util/lua"
	"github.com/argoproj/gitops-engine/pkg/health"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
)

type question struct {
	Object  json.RawMessage `json:"object"`
	Health  string          `json:"health"`
	Actions string          `json:"actions"`
	// The action to take; without one, the question is for the health, and for the actions that a person can choose.
	Action     string            `json:"action"`
	Parameters map[string]string `json:"parameters"`
}

type answer struct {
	Health  *health.HealthStatus         `json:"health,omitempty"`
	Actions []appv1.ResourceAction       `json:"actions,omitempty"`
	Changed []*unstructured.Unstructured `json:"changed,omitempty"`
	Error   string                       `json:"error,omitempty"`
}

func main() {
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	var questions []question
	if err := json.NewDecoder(os.Stdin).Decode(&questions); err != nil {
		return err
	}
	answers := make([]answer, 0, len(questions))
	for _, each := range questions {
		found, err := answered(each)
		if err != nil {
			found.Error = err.Error()
		}
		answers = append(answers, found)
	}
	return json.NewEncoder(os.Stdout).Encode(answers)
}

func answered(asked question) (found answer, err error) {
	object := &unstructured.Unstructured{}
	if err = object.UnmarshalJSON(asked.Object); err != nil {
		return found, err
	}
	overrides := map[string]appv1.ResourceOverride{
		lua.GetConfigMapKey(object.GroupVersionKind()): {HealthLua: asked.Health, Actions: asked.Actions},
	}
	if asked.Action != "" {
		found.Changed, err = changed(object, overrides, asked)
		return found, err
	}
	if found.Health, err = health.GetResourceHealth(object, lua.ResourceHealthOverrides(overrides)); err != nil {
		return found, err
	}
	if asked.Actions != "" {
		found.Actions, err = actions(object, overrides)
	}
	return found, err
}

func actions(object *unstructured.Unstructured, overrides map[string]appv1.ResourceOverride) ([]appv1.ResourceAction, error) {
	vm := lua.VM{ResourceOverrides: overrides}
	scripts, err := vm.GetResourceActionDiscovery(object)
	if err != nil {
		return nil, err
	}
	return vm.ExecuteResourceActionDiscovery(object, scripts)
}

func changed(
	object *unstructured.Unstructured, overrides map[string]appv1.ResourceOverride, asked question,
) ([]*unstructured.Unstructured, error) {
	vm := lua.VM{ResourceOverrides: overrides}
	action, err := vm.GetResourceAction(object, asked.Action)
	if err != nil {
		return nil, err
	}
	parameters := make([]*application.ResourceActionParameters, 0, len(asked.Parameters))
	for name, value := range asked.Parameters {
		parameters = append(parameters, &application.ResourceActionParameters{Name: &name, Value: &value})
	}
	impacted, err := vm.ExecuteResourceAction(object, action.ActionLua, parameters)
	if err != nil {
		return nil, err
	}
	objects := make([]*unstructured.Unstructured, 0, len(impacted))
	for _, each := range impacted {
		objects = append(objects, each.UnstructuredObj)
	}
	return objects, nil
}
